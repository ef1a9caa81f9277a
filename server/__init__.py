"""HTTP at the edge. Knows no tensors and no experts; shows the numbers that the engine gives."""
