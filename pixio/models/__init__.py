"""The paper: layers, block masking, the encoder, the masked autoencoder, and the table of models."""
