"""Growing models that see: classes, masked autoencoding, self-distillation. The loop is the one of texts."""
