"""Text-to-image models as `contracts.Backbone`. Only this package uses diffusers."""
