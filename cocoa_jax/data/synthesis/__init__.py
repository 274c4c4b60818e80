"""Texts about pictures, written by a vision-language model behind an OpenAI-compatible endpoint."""
