"""Any timm classifier as a network that gives `Outputs`: logits, embedding, four stage maps and a tail.

`splits` finds the stages by structure, `architectures` adds networks that timm lacks, `network` runs them, `weights`
saves and loads them. Networks for segmentation come from segmentation_models_pytorch: `segmentation` runs them,
`segmentation_bodies` builds them, `segmentation_names` parses their names.
"""
