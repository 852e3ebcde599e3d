"""Growing and adapting models that write down speech. The loop is the one of texts."""
