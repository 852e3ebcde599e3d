"""Request bodies, one file for each family of endpoints. A field that is not here is refused by its name."""
