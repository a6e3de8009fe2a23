"""Batches come in order and are made once, in advance or when asked for; errors come where they belong."""

import threading

import pytest

from training.ahead import Ahead


@pytest.mark.parametrize("active", [False, True])
def test_items_come_in_order_and_each_is_made_once(active):
    made = []
    with Ahead(lambda number: made.append(number) or number * 10, range(3, 7), active=active) as items:
        assert list(items) == [30, 40, 50, 60]
    assert made == [3, 4, 5, 6]


@pytest.mark.parametrize("active", [False, True])
def test_an_error_is_raised_where_its_item_is_taken(active):
    with Ahead(lambda number: 1 / (2 - number), range(5), active=active) as items:
        assert next(items) == 0.5 and next(items) == 1
        with pytest.raises(ZeroDivisionError):
            next(items)


def test_the_next_item_is_made_while_this_one_is_used():
    begun = threading.Event()

    def make(number):
        if number == 1:
            begun.set()
        return number

    with Ahead(make, range(2), active=True) as items:
        assert next(items) == 0
        assert begun.wait(20)


def test_nothing_is_made_for_nobody():
    made = []
    with Ahead(made.append, range(100), active=True) as items:
        next(items)
    assert len(made) <= 2
