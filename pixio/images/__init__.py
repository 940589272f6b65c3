"""From the bytes of an image to pixels, to the encoder's input, and back."""
