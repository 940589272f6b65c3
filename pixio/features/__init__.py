"""Features of many images, and what they show."""
