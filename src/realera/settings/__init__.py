"""From typed words to checked settings: composing, resolvers, types and ranges, and one sentence for each error."""
