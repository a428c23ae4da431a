"""Reading and storing clips: manifest, media, stores, loader."""
