//! A schedule as a step × rank grid, with cells marked: what every complaint shows.
//!
//! Enters: rows of texts, one row a rank, and marked cells. Leaves: text.
//! Invariant: every marked cell is shown, between `>` and `<`; a grid longer than the window is
//! cut around the marks and says so.

/// Steps shown before the first mark and after the last one.
const MARGIN: usize = 4;
/// Most steps shown.
const WINDOW: usize = 40;
/// Most ranks shown; ranks with marks come first.
const COLUMNS: usize = 16;

/// Draws rows of cells as a grid: a line a step, a column a rank. `marks` are (rank, step).
/// Linear in what is shown.
pub fn grid(rows: &[Vec<String>], marks: &[(usize, usize)]) -> String {
    let n_steps = rows.iter().map(Vec::len).max().unwrap_or(0);
    let (first, last) = window(n_steps, marks);
    let ranks = columns(rows.len(), marks);
    let cell = |rank: usize, step: usize| -> String {
        let text = rows[rank].get(step).map_or("", String::as_str);
        if marks.contains(&(rank, step)) {
            format!(">{text}<")
        } else {
            format!(" {text} ")
        }
    };
    let widths: Vec<usize> = ranks
        .iter()
        .map(|rank| {
            let cells = (first..last).map(|step| cell(*rank, step).chars().count());
            cells.max().unwrap_or(0).max(format!(" rank {rank}").len())
        })
        .collect();
    let label = n_steps.to_string().len().max(4);
    let mut text = format!("{:>label$} ", "step");
    for (rank, width) in ranks.iter().zip(&widths) {
        text += &format!(" {:<width$}", format!(" rank {rank}"));
    }
    end_line(&mut text);
    if first > 0 {
        text += &format!("{:>label$}  {first} steps before\n", "⋮");
    }
    for step in first..last {
        text += &format!("{step:>label$} ");
        for (rank, width) in ranks.iter().zip(&widths) {
            text += &format!(" {:<width$}", cell(*rank, step));
        }
        end_line(&mut text);
    }
    if last < n_steps {
        text += &format!("{:>label$}  {} steps after\n", "⋮", n_steps - last);
    }
    if ranks.len() < rows.len() {
        text += &format!("({} of {} ranks shown)\n", ranks.len(), rows.len());
    }
    text
}

fn end_line(text: &mut String) {
    text.truncate(text.trim_end().len());
    text.push('\n');
}

/// The steps to show: all if they are few, else those around the marks.
fn window(n_steps: usize, marks: &[(usize, usize)]) -> (usize, usize) {
    if n_steps <= WINDOW {
        return (0, n_steps);
    }
    let steps = || marks.iter().map(|(_, step)| *step);
    let first = steps().min().unwrap_or(0).saturating_sub(MARGIN);
    let last = steps().max().unwrap_or(0) + MARGIN + 1;
    (first, last.max(first + 2 * MARGIN).min(n_steps))
}

/// The ranks to show: all if they are few, else the marked ones and their neighbors first.
fn columns(n_ranks: usize, marks: &[(usize, usize)]) -> Vec<usize> {
    let mut ranks: Vec<usize> = (0..n_ranks).collect();
    if n_ranks <= COLUMNS {
        return ranks;
    }
    let distance = |rank: usize| {
        let marked = marks.iter().map(|(marked, _)| marked.abs_diff(rank));
        marked.min().unwrap_or(rank)
    };
    ranks.sort_by_key(|rank| (distance(*rank), *rank));
    let n_marked = ranks.iter().filter(|rank| distance(**rank) == 0).count();
    ranks.truncate(COLUMNS.max(n_marked));
    ranks.sort_unstable();
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_stand_out() {
        let rows = [vec!["0F0".into(), "0B0".into()], vec!["1F0".into()]];
        assert_eq!(
            grid(&rows, &[(0, 1)]),
            "step   rank 0  rank 1\n   0   0F0     1F0\n   1  >0B0<\n"
        );
    }

    #[test]
    fn long_grids_are_cut_around_the_marks() {
        let rows: Vec<Vec<String>> = (0..40)
            .map(|rank| (0..100).map(|step| format!("{rank}F{step}")).collect())
            .collect();
        let text = grid(&rows, &[(20, 50)]);
        assert!(text.contains(">20F50<") && text.contains("46 steps before"));
        assert!(text.lines().count() < 16);
    }
}
