"""Failure tests: a training run is killed, starved of disk, fed bad data and interrupted.

``fork_server`` runs jobs in forks of one warm process and ``fork_client`` talks to it;
``small_run`` is the training run, and says what must be equal between two runs; ``lifetimes``
starts, kills and resumes it; ``injection_points`` are the places where a fault can strike;
``io_faults`` makes single I/O operations fail; ``nonfinite_steps`` makes a loss, a gradient or an
activation non-finite; ``disk_limits`` are full and read-only file systems; ``broken_variants``
are defects that the harness must catch; ``outcome_table`` collects the table that is printed at
the end.

``@pytest.mark.goal("R1", "what is done")`` and the fixture ``row`` make a test a row of that
table. ``sizes(short, full)`` makes two sizes of a test: `make test` runs the short one, `make
chaos` the full one.
"""
