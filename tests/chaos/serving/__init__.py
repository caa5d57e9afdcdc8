"""Failure tests of the server: its real process, with a real small model.

``server`` starts the process and says what it holds (memory, files, threads, pages, slots);
``client`` is a connection that can be dropped at any point; ``mix`` draws requests of every kind;
``load`` sends many at once and counts how each of them ended; ``soak`` runs for half an hour.
"""
