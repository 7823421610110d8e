"""What makes a document worth reading: reading, cleaning, tagging, retrieval, selection."""
