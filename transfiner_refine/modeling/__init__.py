"""The networks: the Transfiner of the paper and the image encoder that feeds it without a detector."""
