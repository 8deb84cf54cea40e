"""Images from folders and loaders: read, named, split and identified."""
