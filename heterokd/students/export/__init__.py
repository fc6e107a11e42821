"""A trained student as files that run without heterokd: ONNX, torch.export, or safetensors that timm opens.

    with find_student(root, "models:/digits-student@champion") as student:
        exported = export_student(student, "onnx", Path("deploy"))

Every file is opened again and compared with the trained student: on real images of the study's val split, in batches of
one and five. Files that disagree are deleted.

`find` finds the student, `formats` has a file for each format (`format` is their interface), `parity` compares,
`export` combines them.
"""
