"""What the same hours of one machine teach an encoder, method beside method."""
