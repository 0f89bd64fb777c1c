"""What is read: shards, views, tokenizers and the built-in scenes."""
