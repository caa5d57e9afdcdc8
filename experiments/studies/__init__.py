"""Measurements that a page of the documentation is made from, each a module to run."""
