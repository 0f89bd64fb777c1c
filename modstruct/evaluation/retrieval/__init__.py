"""Retrieval at any size: exact ranks by counting, or FAISS's approximate lists, and the metrics made of them."""
