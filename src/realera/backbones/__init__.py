"""The only window on diffusers: text-to-image models as `contracts.Backbone`."""
