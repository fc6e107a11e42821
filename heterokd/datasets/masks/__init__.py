"""Label maps of the user: their settings, their files, their classes, and the images that they belong to."""
