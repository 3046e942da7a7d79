def test_a_line_for_every_number_of_candidates(script, short_run):
    end = script("benchmarks/questions.py", short_run)
    assert end.status == 0, end.err
    rows = [line.strip("| ").split(" | ") for line in end.out.splitlines() if line.startswith("| ")][1:]
    assert [int(row[0]) for row in rows] == [2, 3, 5, 8, 16, 64]
    right = [float(row[1].split("%")[0]) for row in rows]
    assert right[0] == 100 and right == sorted(right, reverse=True)  # of two candidates, both are sources
    guesses = [float(row[4]) for row in rows]
    assert guesses == sorted(guesses) and abs(guesses[1] - 0.51) < 0.02


def test_what_is_no_run_is_refused(script, tmp_path):
    end = script("benchmarks/questions.py", tmp_path)
    assert end.status == 2 and "holds no checkpoint.pt" in end.err and end.err.count("\n") == 1
