"""What an exported Backpack brings along: files that transformers runs by themselves, without xlmega.

They are copied into the export as they are. The one place besides `weights.huggingface` that may import transformers.
"""
