"""The U-Net, its checkpoints, and the layout of diffusers that both have."""
