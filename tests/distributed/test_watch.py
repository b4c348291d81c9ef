"""Who is named where a run does not move on."""

from tests.distributed import watch_cases


def said(answers):
    return [line for lines, _ in answers for line in lines]


def test_one_that_gives_no_sign_of_life_is_named_once(world):
    answers = world(4).run(watch_cases.told_of, 2, is_slow=False)
    assert said(answers) == ["rank 2 did not get past step 7 for 0.4 s, and the others wait"]
    assert [ended for _, ended in answers] == [True, True, False, True]


def test_none_is_named_where_all_live(world):
    assert said(world(4).run(watch_cases.told_of, None, is_slow=False)) == ["no rank got past step 7 for 0.4 s"]


def test_what_is_slow_may_take_any_time_but_not_in_silence(world):
    assert world(4).run(watch_cases.told_of, None, is_slow=True) == 4 * [([], False)]
    answers = world(4).run(watch_cases.told_of, 2, is_slow=True)
    assert said(answers) == ["rank 2 did not get past step 7 for 0.4 s, and the others wait"]
