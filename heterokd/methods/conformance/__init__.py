"""What every method owes its callers, checked on random outputs of tiny teacher-student pairs.

    from heterokd.methods.conformance.checks import check_method

    assert not check_method(MyKD)

`heterokd methods ./my_method.py:MyKD --check` prints what is wrong with a method; heterokd's tests run the same checks
on every file of `heterokd/methods/`.
"""
