//! Bars of boxes for terminals: windows of memory slices become columns, and those become lines of styled text. Pure.

use std::ops::Range;

use anstyle::{Ansi256Color, Style};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::State;

/// Columns that a memory slice needs at least: two sides of a box and something between. A narrower terminal breaks the lines.
const NARROWEST: usize = 3;
/// Columns from which on a name may take two lines: two shorter ones can't be read.
const TWO_LINES: usize = 6;

/// What is drawn on.
#[derive(Debug, Clone, Copy)]
pub struct Canvas {
    /// Columns.
    pub width: usize,
    /// ASCII characters only.
    pub ascii: bool,
    /// ANSI colours.
    pub color: bool,
}

/// A box of a bar.
#[derive(Debug, Clone)]
pub struct Block {
    /// First memory slice.
    pub start: u32,
    /// Memory slices.
    pub size: u32,
    /// Its colour and frame.
    pub state: State,
    /// Drawn with a heavy frame.
    pub selected: bool,
    /// What is written into it, from the top.
    pub lines: Vec<Line>,
    /// What is written at the bottom.
    pub foot: Option<Line>,
}

/// A line in a box. Of several texts the first that fits is taken, else the beginning of the last.
#[derive(Debug, Clone)]
pub enum Line {
    /// Bold, after a mark.
    Title(Option<char>, Vec<String>),
    /// Ordinary.
    Text(Vec<String>),
    /// In two lines where one is too short.
    Name(String),
    /// Side by side, each as wide as its share of the sum.
    Parts(Vec<(u32, String)>),
    /// How much of something is used, from 0 to 1.
    Gauge(f64),
}

/// A piece of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Printable.
    pub text: String,
    /// How it is printed.
    pub look: Look,
}

/// How a piece of text is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// As the terminal prints.
    Plain,
    /// Bold.
    Strong,
    /// Less than plain.
    Note,
    /// To be seen.
    Warning,
    /// Frame of a box.
    Frame(State),
    /// Frame of the selected box.
    Chosen(State),
    /// Text in a box.
    Inside(State),
    /// Bold text in a box.
    Heading(State),
    /// A mark in the legend.
    Mark(State),
}

/// Background, text and frame of each state that fills its box. Told apart with any colour blindness (after Okabe and Ito),
/// and by the marks without any colour.
fn colors(state: State) -> Option<(u8, u8, u8)> {
    match state {
        State::Held => Some((25, 231, 110)),
        State::Static => Some((29, 231, 115)),
        State::Idle => Some((66, 231, 109)),
        State::Reserved => Some((96, 231, 182)),
        State::Foreign => Some((179, 16, 94)),
        State::Releasing => Some((110, 16, 24)),
        State::Quarantined => Some((166, 231, 223)),
        State::Lost | State::Hidden | State::Free | State::Unusable => None,
    }
}

impl Look {
    /// Its colours.
    pub fn style(self) -> Style {
        let bold = matches!(self, Look::Strong | Look::Warning | Look::Heading(_) | Look::Mark(_) | Look::Chosen(_));
        let (fore, back) = match self {
            Look::Plain | Look::Strong => (None, None),
            Look::Note => (Some(245), None),
            Look::Warning => (Some(172), None),
            Look::Frame(state)
            | Look::Chosen(state)
            | Look::Inside(state)
            | Look::Heading(state)
            | Look::Mark(state) => match (colors(state), self) {
                (Some((back, _, frame)), Look::Frame(_)) => (Some(frame), Some(back)),
                (Some((back, _, _)), Look::Mark(_)) => (Some(back), None),
                (Some((back, fore, _)), _) => (Some(fore), Some(back)),
                (None, _) if state == State::Lost => (Some(166), None),
                (None, _) => (Some(245), None),
            },
        };
        let color = |color: Option<u8>| color.map(|color| Ansi256Color(color).into());
        let style = Style::new().fg_color(color(fore)).bg_color(color(back));
        if bold { style.bold() } else { style }
    }
}

impl Span {
    /// That text in that look.
    pub fn new(text: impl Into<String>, look: Look) -> Span {
        Span { text: text.into(), look }
    }
}

/// Characters of a frame: corners from the upper left with the clock, horizontal, vertical, and where a slice begins below.
struct Frame([char; 7]);

impl Canvas {
    fn frame(&self, state: State, selected: bool) -> Frame {
        let dashed = matches!(state, State::Free | State::Unusable | State::Lost);
        Frame(match (self.ascii, selected, dashed) {
            (false, true, _) => ['┏', '┓', '┛', '┗', '━', '┃', '┻'],
            (false, false, true) => ['┌', '┐', '┘', '└', '╌', '╎', '┴'],
            (false, false, false) => ['╭', '╮', '╯', '╰', '─', '│', '┴'],
            (true, true, _) => ['#', '#', '#', '#', '=', '#', '#'],
            (true, false, true) => ['.', '.', '.', '.', '.', ':', '.'],
            (true, false, false) => ['+', '+', '+', '+', '-', '|', '+'],
        })
    }

    /// What tells a state from the others without colour.
    pub fn mark(&self, state: State) -> char {
        match (self.ascii, state) {
            (false, State::Held) => '●',
            (false, State::Static) => '○',
            (false, State::Idle) => '◌',
            (false, State::Reserved) => '◆',
            (false, State::Foreign) => '▲',
            (false, State::Releasing) => '◐',
            (false, State::Quarantined) => '✗',
            (false, State::Unusable) => '╱',
            (true, State::Held) => '*',
            (true, State::Static) => 'o',
            (true, State::Idle) => '_',
            (true, State::Reserved) => '@',
            (true, State::Foreign) => '^',
            (true, State::Releasing) => '~',
            (true, State::Quarantined) => 'x',
            (true, State::Unusable) => '/',
            (false, State::Hidden) => '·',
            (true, State::Hidden) => '-',
            (_, State::Lost) => '?',
            (_, State::Free) => ' ',
        }
    }

    /// A text without what would move the cursor or hide other text, and in ASCII where that is asked for.
    pub fn clean(&self, text: &str) -> String {
        let printable = |c: char| c.width().is_some_and(|width| width > 0) && (!self.ascii || c.is_ascii());
        text.chars().map(|c| if printable(c) { c } else { '?' }).collect()
    }

    /// A clean text in exactly that many columns.
    fn fit(&self, text: &str, width: usize) -> String {
        let mut text = self.clean(text);
        if text.width() > width {
            let (more, room) = (if self.ascii { '~' } else { '…' }, width.saturating_sub(1));
            while text.width() > room {
                text.pop();
            }
            if width > 0 {
                text.push(more);
            }
        }
        let rest = width.saturating_sub(text.width());
        text + &" ".repeat(rest)
    }

    /// A line that is no longer than the canvas.
    pub fn cut(&self, mut spans: Vec<Span>) -> Vec<Span> {
        let mut room = self.width;
        for span in &mut spans {
            let width = span.text.width();
            if width > room {
                span.text = self.fit(&span.text, room);
            }
            room = room.saturating_sub(width);
        }
        spans.retain(|span| !span.text.is_empty());
        spans
    }

    /// A sentence in as many lines as it takes, after a mark or nothing.
    pub fn wrap(&self, look: Look, mark: &str, text: &str) -> Vec<Vec<Span>> {
        let mut lines: Vec<String> = Vec::new();
        for word in self.clean(text).split_whitespace() {
            match lines.last_mut() {
                Some(line) if line.width() + 1 + word.width() <= self.width => *line += &format!(" {word}"),
                Some(_) => lines.push(format!("  {word}")),
                None => lines.push(format!("{mark}{word}")),
            }
        }
        lines.into_iter().map(|line| vec![Span::new(line, look)]).collect()
    }

    /// Pieces one after another, so many columns apart, in as many lines as it takes.
    pub fn flow(&self, pieces: Vec<Vec<Span>>, apart: usize) -> Vec<Vec<Span>> {
        let width = |piece: &[Span]| piece.iter().map(|span| span.text.width()).sum::<usize>();
        let mut lines: Vec<Vec<Span>> = Vec::new();
        for piece in pieces {
            match lines.last_mut() {
                Some(line) if width(line) + apart + width(&piece) <= self.width => {
                    line.push(Span::new(" ".repeat(apart), Look::Plain));
                    line.extend(piece);
                }
                _ => lines.push(piece),
            }
        }
        lines
    }

    /// Lines as text, with colours where the canvas has them.
    pub fn text(&self, lines: &[Vec<Span>]) -> String {
        let mut text = String::new();
        for line in lines {
            let start = text.len();
            for Span { text: part, look } in line {
                text += &if self.color { crate::cli::styled(look.style(), part) } else { part.clone() };
            }
            text.truncate(start + text[start..].trim_end_matches(' ').len());
            text.push('\n');
        }
        text
    }
}

/// The columns of each window, in proportion and none overlapping; none for a window that is empty, beyond the last slice,
/// or in the way of an earlier one.
pub fn columns(slices: u32, windows: &[(u32, u32)], width: usize) -> Vec<Option<Range<usize>>> {
    let all = slices as usize;
    let width = width.max(all * NARROWEST);
    let column = |slice: u32| slice as usize * width / all.max(1);
    let mut taken: Vec<Range<usize>> = Vec::new();
    let place = |&(start, size): &(u32, u32)| {
        let end = start.checked_add(size).filter(|end| size > 0 && *end <= slices)?;
        let columns = column(start)..column(end);
        let free = taken.iter().all(|other| other.end <= columns.start || columns.end <= other.start);
        free.then(|| taken.push(columns.clone()))?;
        Some(columns)
    };
    windows.iter().map(place).collect()
}

/// A bar: a box for each block, as high as the one with the most lines.
pub fn draw(slices: u32, blocks: &[Block], canvas: &Canvas) -> Vec<Vec<Span>> {
    let windows: Vec<(u32, u32)> = blocks.iter().map(|block| (block.start, block.size)).collect();
    let columns = columns(slices, &windows, canvas.width);
    let mut placed: Vec<(Range<usize>, &Block)> =
        columns.into_iter().zip(blocks).filter_map(|(columns, block)| Some((columns?, block))).collect();
    placed.sort_by_key(|(columns, _)| columns.start);
    let written: Vec<Vec<Span>> =
        placed.iter().map(|(columns, block)| write(block, columns.len() - 2, canvas)).collect();
    let lines_of =
        |(written, (_, block)): (&Vec<Span>, &(_, &Block))| written.len() + usize::from(block.foot.is_some());
    let height = written.iter().zip(&placed).map(lines_of).max().unwrap_or(0);
    let mut lines: Vec<Vec<Span>> = vec![Vec::new(); height + 2];
    let mut end = 0;
    for ((columns, block), written) in placed.into_iter().zip(written) {
        let drawn = draw_box(block, columns.len(), written, height, canvas);
        for (line, spans) in lines.iter_mut().zip(drawn) {
            if columns.start > end {
                line.push(Span::new(" ".repeat(columns.start - end), Look::Plain));
            }
            line.extend(spans);
        }
        end = columns.end;
    }
    lines
}

fn draw_box(block: &Block, width: usize, written: Vec<Span>, height: usize, canvas: &Canvas) -> Vec<Vec<Span>> {
    let Frame([upper_left, upper_right, lower_right, lower_left, across, down, tick]) =
        canvas.frame(block.state, block.selected);
    let look = if block.selected { Look::Chosen(block.state) } else { Look::Frame(block.state) };
    let inner = width - 2;
    let label = format!("{}:{}", block.start, block.size);
    let label = if label.len() <= inner { label } else { String::new() };
    let rest: String = std::iter::repeat_n(across, inner - label.len()).collect();
    let mut lines = vec![vec![Span::new(format!("{upper_left}{label}{rest}{upper_right}"), look)]];
    let hatched = block.state == State::Unusable;
    let fill = if hatched { canvas.mark(block.state) } else { ' ' }.to_string().repeat(inner);
    let blank = Span::new(fill, Look::Inside(block.state));
    let foot = block.foot.as_ref().map(|line| written_line(block.state, line, inner, canvas));
    let mut rows = if hatched { Vec::new() } else { written };
    rows.resize(height - usize::from(foot.is_some()), blank);
    for row in rows.into_iter().chain(foot) {
        lines.push(vec![Span::new(down, look), row, Span::new(down, look)]);
    }
    let slices = block.size as usize;
    let begins = |column: usize| (1..slices).any(|slice| slice * width / slices == column);
    let bottom: String = (1..=inner).map(|column| if begins(column) { tick } else { across }).collect();
    lines.push(vec![Span::new(format!("{lower_left}{bottom}{lower_right}"), look)]);
    lines
}

/// What stands in a box that wide, from the top.
fn write(block: &Block, width: usize, canvas: &Canvas) -> Vec<Span> {
    let mut lines = Vec::new();
    for line in &block.lines {
        let whole = written_line(block.state, line, width, canvas);
        lines.push(whole);
        if let Line::Name(name) = line
            && let (_, rest) = split_name(&canvas.clean(name), width)
            && !rest.is_empty()
        {
            lines.push(Span::new(canvas.fit(rest, width), Look::Inside(block.state)));
        }
    }
    lines
}

/// The parts of a name in the first and in the second line: broken behind a hyphen or the like where both parts then fit.
pub(super) fn split_name(name: &str, width: usize) -> (&str, &str) {
    let part = |at: usize| name.split_at(at);
    if name.width() <= width || width < TWO_LINES {
        return (name, "");
    }
    let ends = name.char_indices().map(|(n, c)| n + c.len_utf8());
    let full: Vec<usize> = ends.take_while(|end| name[..*end].width() <= width).collect();
    let good = |end: &&usize| name[..**end].ends_with(['-', '_', '.', '/', ' ']) && name[**end..].width() <= width;
    let (first, rest) = part(*full.iter().rev().find(good).or(full.last()).unwrap_or(&0));
    (first.trim_end(), rest)
}

fn written_line(state: State, line: &Line, width: usize, canvas: &Canvas) -> Span {
    let choose = |texts: &[String]| {
        let fitting = texts.iter().find(|text| text.width() <= width).or(texts.last());
        canvas.fit(fitting.map_or("", String::as_str), width)
    };
    let text = match line {
        Line::Title(mark, texts) => {
            let mark = mark.map(String::from).unwrap_or_default();
            let apart: Vec<String> =
                texts.iter().map(|text| format!("{mark} {text}").trim_start().to_owned()).collect();
            let close = texts.iter().map(|text| format!("{mark}{text}"));
            let both: Vec<String> = apart.into_iter().zip(close).flat_map(|(apart, close)| [apart, close]).collect();
            return Span::new(choose(&both), Look::Heading(state));
        }
        Line::Text(texts) => choose(texts),
        Line::Name(name) => choose(&[split_name(&canvas.clean(name), width).0.to_owned()]),
        Line::Parts(parts) => side_by_side(parts, width, canvas),
        Line::Gauge(share) => {
            let full = (share.clamp(0.0, 1.0) * width as f64).round() as usize;
            let (used, free) = if canvas.ascii { ('#', '.') } else { ('━', '─') };
            (0..width).map(|n| if n < full { used } else { free }).collect()
        }
    };
    Span::new(text, Look::Inside(state))
}

fn side_by_side(parts: &[(u32, String)], width: usize, canvas: &Canvas) -> String {
    let all: u32 = parts.iter().map(|(share, _)| share).sum();
    let (mut text, mut before) = (String::new(), 0);
    for (n, (share, part)) in parts.iter().enumerate() {
        let start = before as usize * width / all.max(1) as usize;
        before += share;
        let end = before as usize * width / all.max(1) as usize;
        if n > 0 && end > start {
            text.push(if canvas.ascii { '|' } else { '┊' });
        }
        text += &canvas.fit(part, end.saturating_sub(text.width()));
    }
    canvas.fit(&text, width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STATES: [State; 11] = [
        State::Held,
        State::Static,
        State::Idle,
        State::Reserved,
        State::Foreign,
        State::Releasing,
        State::Quarantined,
        State::Lost,
        State::Hidden,
        State::Free,
        State::Unusable,
    ];

    fn canvas(width: usize, ascii: bool) -> Canvas {
        Canvas { width, ascii, color: false }
    }

    fn block(start: u32, size: u32, lines: Vec<Line>) -> Block {
        Block { start, size, state: State::Held, selected: false, lines, foot: None }
    }

    #[test]
    fn a_bar_is_as_wide_as_the_terminal_and_in_proportion() {
        assert_eq!(
            columns(8, &[(0, 4), (4, 2), (6, 1), (7, 1)], 80),
            [Some(0..40), Some(40..60), Some(60..70), Some(70..80)]
        );
        assert_eq!(columns(4, &[(3, 1)], 10), [Some(9..12)], "no box is narrower than three columns");
        assert_eq!(
            columns(8, &[(0, 4), (3, 2), (4, 0), (6, 3), (u32::MAX, 2)], 80),
            [Some(0..40), None, None, None, None]
        );
        assert_eq!(columns(0, &[(0, 1)], 80), [None]);
    }

    #[test]
    fn long_names_are_cut_and_odd_ones_harmless() {
        let canvas = canvas(80, false);
        assert_eq!(canvas.fit("trainer-of-models", 8), "trainer…");
        assert_eq!(canvas.fit("日本語", 5), "日本…");
        assert_eq!(canvas.fit("日本語", 4), "日… ");
        assert_eq!((canvas.fit("ab", 0), canvas.fit("ab", 1)), (String::new(), "…".to_owned()));
        assert_eq!(canvas.clean("a\u{1b}[31mb\u{202e}c\n"), "a?[31mb?c?");
        assert_eq!(Canvas { ascii: true, ..canvas }.clean("ü…"), "??");
    }

    #[test]
    fn compute_instances_stand_side_by_side() {
        let parts = [(1, "1c CI 0".to_owned()), (2, "2c CI 1".to_owned())];
        assert_eq!(side_by_side(&parts, 30, &canvas(80, false)), "1c CI 0   ┊2c CI 1            ");
        assert_eq!(side_by_side(&parts, 30, &canvas(80, true)), "1c CI 0   |2c CI 1            ");
        assert_eq!(side_by_side(&parts, 6, &canvas(80, false)), "1…┊2c…");
    }

    #[test]
    fn a_name_takes_a_second_line_before_it_is_cut() {
        let name = |name: &str, width: usize| {
            let block = block(0, 1, vec![Line::Name(name.into())]);
            write(&block, width, &canvas(80, false)).into_iter().map(|span| span.text).collect::<Vec<_>>()
        };
        assert_eq!(name("web", 8), ["web     "]);
        assert_eq!(name("3f0a51c2d4e6", 8), ["3f0a51c2", "d4e6    "]);
        assert_eq!(name("jupyter-alice", 8), ["jupyter-", "alice   "]);
        assert_eq!(name("a-very-long-name-indeed", 8), ["a-very-l", "ong-nam…"]);
        assert_eq!(name("for daemon", 8), ["for     ", "daemon  "]);
        assert_eq!(name("trainer", 4), ["tra…"]);
        let title = |width| {
            written_line(
                State::Held,
                &Line::Title(Some('*'), vec!["1g.10gb".into(), "1g".into()]),
                width,
                &canvas(80, false),
            )
            .text
        };
        assert_eq!(
            [title(10), title(8), title(7), title(3), title(2)],
            ["* 1g.10gb ", "*1g.10gb", "* 1g   ", "*1g", "*…"]
        );
    }

    #[test]
    fn every_state_has_a_mark_of_its_own() {
        for ascii in [false, true] {
            let canvas = canvas(80, ascii);
            let marks: std::collections::BTreeSet<char> = STATES.iter().map(|state| canvas.mark(*state)).collect();
            assert_eq!(marks.len(), STATES.len(), "{marks:?}");
        }
    }

    #[test]
    fn sentences_and_legends_keep_to_the_width() {
        let canvas = canvas(20, false);
        let text = canvas.text(&canvas.wrap(Look::Note, "● ", "one two three four five six"));
        assert_eq!(text, "● one two three four\n  five six\n");
        let long =
            canvas.cut(vec![Span::new("GPU 0", Look::Strong), Span::new("  NVIDIA A100-SXM4-80GB", Look::Plain)]);
        assert_eq!(canvas.text(&[long]), "GPU 0  NVIDIA A100-…\n");
    }

    fn line() -> impl Strategy<Value = Line> {
        prop_oneof![
            prop::collection::vec("\\PC{0,12}", 0..3).prop_map(|texts| Line::Title(Some('*'), texts)),
            prop::collection::vec(".{0,12}", 0..3).prop_map(Line::Text),
            prop::collection::vec((0..5_u32, "[a-z0-9 ]{0,9}"), 0..4).prop_map(Line::Parts),
            any::<f64>().prop_map(Line::Gauge),
            ".{0,20}".prop_map(Line::Name),
        ]
    }

    fn any_block() -> impl Strategy<Value = Block> {
        let size = prop_oneof![0..14_u32, any::<u32>()];
        let lines = prop::collection::vec(line(), 0..5);
        let place = (size.clone(), size, 0..STATES.len());
        (place, any::<bool>(), lines, prop::option::of(line())).prop_map(
            |((start, size, state), selected, lines, foot)| Block {
                start,
                size,
                state: STATES[state],
                selected,
                lines,
                foot,
            },
        )
    }

    proptest! {
        #[test]
        fn nothing_overlaps_and_widths_sum_up(slices in 0..33_u32, blocks in prop::collection::vec(any_block(), 0..12), width in 1..300_usize, ascii: bool) {
            let windows: Vec<(u32, u32)> = blocks.iter().map(|b| (b.start, b.size)).collect();
            let widest = width.max(slices as usize * NARROWEST);
            let mut seen = vec![false; widest];
            for columns in columns(slices, &windows, width).into_iter().flatten() {
                prop_assert!(columns.len() >= NARROWEST && columns.end <= widest);
                for column in columns {
                    prop_assert!(!std::mem::replace(&mut seen[column], true));
                }
            }
            let end = seen.iter().rposition(|seen| *seen).map_or(0, |last| last + 1);
            for line in draw(slices, &blocks, &canvas(width, ascii)) {
                let drawn: usize = line.iter().map(|span| span.text.width()).sum();
                prop_assert_eq!(drawn, end, "{:?}", line);
                prop_assert!(!ascii || line.iter().all(|span| span.text.is_ascii()), "{:?}", line);
            }
        }

        #[test]
        fn windows_that_cover_a_gpu_fill_the_line(sizes in prop::collection::vec(1..5_u32, 1..9), width in 1..300_usize) {
            let mut start = 0;
            let blocks: Vec<Block> = sizes.iter().map(|size| { start += size; block(start - size, *size, vec![]) }).collect();
            for line in draw(start, &blocks, &canvas(width, false)) {
                let drawn: usize = line.iter().map(|span| span.text.width()).sum();
                prop_assert_eq!(drawn, width.max(start as usize * NARROWEST));
            }
        }
    }
}
