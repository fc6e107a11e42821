"""A trained student as files that run without heterokd: ONNX, torch.export, or safetensors that timm opens.

    with find_student(root, "models:/digits-student@champion") as student:
        exported = export_student(student, "onnx", Path("deploy"))

Nothing is kept that was not checked: what was written is opened again from its file, and its logits for real images of
the study's val split, one and five at a time, are compared with those of the trained student.

`find` finds the student, `formats` has a file for each format (`format` is their contract), `parity` compares,
`export` does it all.
"""
