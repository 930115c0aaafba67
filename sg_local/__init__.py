"""A GGUF model, an instruction and up to three examples become a better GGUF (SELF-GUIDE, arXiv 2407.12874)."""
