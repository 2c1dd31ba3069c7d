"""Model families: loading, text, prediction, and the names of LoRA targets."""
