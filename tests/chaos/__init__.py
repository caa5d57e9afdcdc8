"""Training is killed, starved, lied to and interrupted, and must not notice.

``server`` and ``forks`` run lives of a training run in forked processes; ``lab`` is the run itself
and says what of two runs must be equal; ``moments`` are the places where something can happen to
it; ``disk`` makes single input and output operations fail; ``controls`` are broken variants that
the harness must catch; ``results`` collects the table that is printed at the end.

A test becomes a row of that table by ``@pytest.mark.goal("R1", "what is done")`` and the fixture
``row``, in which it counts and says what came out. Twins of different size are made by
``sizes(short, full)``: `make test` runs the short one, `make chaos` the full one.
"""
