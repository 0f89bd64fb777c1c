"""Readers of the downstream tasks' published files, exactly as a user downloads them: one small file each.

Every reader returns `TaskEntries`: frozen records in the order of the file, and what was left out, by cause. A
missing file or folder is refused by the option that named it, a malformed entry by file, number and key
(published_files.py); images are looked up in listings of their folders (image_folders.py).
"""
