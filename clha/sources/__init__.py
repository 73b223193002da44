"""Readers of prompts and preference pairs: HH-RLHF text, chat JSONL, TRL formats, datasets."""
