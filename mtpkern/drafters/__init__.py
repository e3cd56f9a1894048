"""What proposes tokens: heads, the sequence itself, and how many of them."""
