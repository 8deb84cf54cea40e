"""Files and folders: complete or absent, compared with their hashes, read without running code."""
