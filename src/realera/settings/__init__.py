"""Settings: composing them, resolvers, checks of types and ranges, and one sentence for each error."""
