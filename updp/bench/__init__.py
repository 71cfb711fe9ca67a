"""What is faster on this machine: networks in every runtime, merged layers in every form; correctness first."""
