"""What captions and images know about a label, and what exact alignment costs: section 3 of Jiang et al. 2023."""
