"""The experiments of the papers, each a command: recall, scaling, retrieval from long texts."""
