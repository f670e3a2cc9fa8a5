"""Tests of the token ops."""
