"""Images from folders and loaders: read, named, split and told apart."""
