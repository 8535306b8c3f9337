//! The screen of `migctl top`. Keys, looks and signals come in over one channel, so that a driver that does not answer
//! stops neither the keys nor the end.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Block, Cell, Clear, Paragraph, Row, Table, TableState};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::config::Settings;
use crate::gpu::nvml::Nvml;
use crate::report;
use crate::request::GpuSelector;

use super::super::map::bar::{self, Canvas, Look};
use super::super::map::{self, GpuMap};
use super::{Args, Frame, Live, TITLES, Watch, block, columns, process_columns};

/// Without news for that long the age of what is shown is told.
const SILENCE: Duration = Duration::from_secs(3);
/// Lines that the table of slices has at least: its titles and some slices.
const TABLE: u16 = 4;
/// Lines for the processes of the selected slice: a title, the columns' titles and some processes.
const PROCESSES: u16 = 5;
const HELP: [(&str, &str); 7] = [
    ("up, down, k, j", "another slice"),
    ("g", "the next GPU"),
    ("s", "sort the slices: by place, memory, SM"),
    ("p, space", "pause, and go on"),
    ("l", "what the marks mean"),
    ("?, h", "this help"),
    ("q, Esc, Ctrl-C", "quit"),
];

enum News {
    Input(Event),
    Look(Result<Frame, String>),
    Signal(i32),
    /// The terminal has gone.
    Deaf(std::io::Error),
}

enum End {
    Quit,
    Signal(i32),
}

/// Shows it until somebody ends it. However it ends, the terminal is as it was before.
pub(super) fn run(settings: &Settings, args: &Args) -> Result<()> {
    let canvas = map::canvas(args.ascii, map::When::Auto);
    let (sender, news) = mpsc::channel();
    // Before the terminal is changed: a signal from here on is news.
    listen_for_signals(sender.clone())?;
    let mut terminal = ratatui::try_init()
        .context("the terminal can't be used as a screen; migctl top --once prints one look as text")?;
    show_cursor_after_a_panic();
    listen_for_keys(sender.clone());
    look(settings.clone(), args.gpus.clone(), args.interval, sender);
    let mut view = View::new(canvas, args.interval);
    let end = (|| loop {
        terminal.draw(|screen| view.draw(screen))?;
        match news.recv_timeout(Duration::from_secs(1)) {
            Ok(News::Input(Event::Key(key))) if key.kind != KeyEventKind::Release => {
                if let Some(end) = view.key(key) {
                    return Ok(end);
                }
            }
            Ok(News::Look(look)) => view.take(look),
            Ok(News::Signal(signal)) => return Ok(End::Signal(signal)),
            Ok(News::Deaf(error)) => return Err(error),
            Ok(News::Input(_)) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(End::Quit),
        }
    })();
    terminal.show_cursor()?;
    ratatui::try_restore()?;
    match end? {
        End::Quit => Ok(()),
        // Whoever waits for us is to see what ended us.
        End::Signal(signal) => Ok(emulate_default_handler(signal)?),
    }
}

/// ratatui's own hook puts back all but that, and a panic ends us before anything is dropped.
fn show_cursor_after_a_panic() {
    let restore = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let _ = execute!(std::io::stdout(), Show);
        restore(info);
    }));
}

fn listen_for_signals(sender: Sender<News>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGINT])?;
    thread::spawn(move || signals.forever().try_for_each(|signal| sender.send(News::Signal(signal))));
    Ok(())
}

fn listen_for_keys(sender: Sender<News>) {
    thread::spawn(move || {
        loop {
            let news = event::read().map_or_else(News::Deaf, News::Input);
            let last = matches!(news, News::Deaf(_));
            if sender.send(news).is_err() || last {
                return;
            }
        }
    });
}

fn look(settings: Settings, gpus: Vec<GpuSelector>, interval: Duration, sender: Sender<News>) {
    thread::spawn(move || {
        let nvml = Nvml::at(&settings.nvml);
        let mut watch = Watch::new(&settings, &nvml, &gpus);
        loop {
            let look = watch.look().map_err(|error| report::sentence(&error));
            if sender.send(News::Look(look)).is_err() {
                return;
            }
            thread::sleep(interval);
        }
    });
}

/// A slice among others: ids come again at other places.
type Key = (String, u32, Option<u32>, u32);

fn key_of(live: &Live) -> Key {
    (live.gpu.clone(), live.gi, live.ci, live.start)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Place,
    Memory,
    Sm,
}

/// What is shown, and what is chosen in it.
struct View {
    canvas: Canvas,
    interval: Duration,
    frame: Option<Frame>,
    /// When the frame came.
    since: Instant,
    /// Why there is no newer one.
    trouble: Option<String>,
    paused: bool,
    help: bool,
    legend: bool,
    order: Order,
    /// UUID of the GPU that is to be seen.
    gpu: Option<String>,
    selected: Option<Key>,
}

impl View {
    fn new(canvas: Canvas, interval: Duration) -> View {
        View {
            canvas,
            interval,
            frame: None,
            since: Instant::now(),
            trouble: None,
            paused: false,
            help: false,
            legend: false,
            order: Order::Place,
            gpu: None,
            selected: None,
        }
    }

    /// A new look, or why there is none.
    fn take(&mut self, look: Result<Frame, String>) {
        if self.paused {
            return;
        }
        match look {
            Err(trouble) => self.trouble = Some(trouble),
            Ok(frame) => {
                let before = self.position();
                (self.frame, self.trouble, self.since) = (Some(frame), None, Instant::now());
                if self.position().is_none() {
                    self.select(before.unwrap_or(0));
                }
            }
        }
    }

    fn rows(&self) -> Vec<&Live> {
        let mut rows: Vec<&Live> = self.frame.iter().flat_map(|frame| &frame.slices).collect();
        let most = |figure: f64| std::cmp::Reverse((figure * 100.0) as u64);
        match self.order {
            Order::Place => {}
            Order::Memory => rows.sort_by_key(|live| std::cmp::Reverse(live.memory_used_mib)),
            Order::Sm => rows.sort_by_key(|live| live.sm_percent.map_or(most(0.0), most)),
        }
        rows
    }

    fn position(&self) -> Option<usize> {
        let selected = self.selected.as_ref()?;
        self.rows().iter().position(|live| key_of(live) == *selected)
    }

    fn select(&mut self, row: usize) {
        let rows = self.rows();
        let chosen = rows.get(row).or(rows.last()).map(|live| key_of(live));
        if let Some(key) = &chosen {
            self.gpu = Some(key.0.clone());
        }
        self.selected = chosen;
    }

    fn next_gpu(&mut self) {
        let Some(frame) = &self.frame else { return };
        let gpus: Vec<&String> = frame.map.gpus.iter().map(|gpu| &gpu.uuid).collect();
        let now = gpus.iter().position(|uuid| Some(*uuid) == self.gpu.as_ref());
        let next = now.map_or(0, |now| (now + 1) % gpus.len().max(1));
        self.gpu = gpus.get(next).map(|uuid| (*uuid).clone());
        let first = self.rows().into_iter().find(|live| Some(&live.gpu) == self.gpu.as_ref()).map(key_of);
        self.selected = first;
    }

    fn key(&mut self, key: KeyEvent) -> Option<End> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return (key.code == KeyCode::Char('c')).then_some(End::Quit);
        }
        let row = self.position();
        match key.code {
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Char('q') | KeyCode::Esc => return Some(End::Quit),
            KeyCode::Char('?' | 'h') => self.help = !self.help,
            KeyCode::Char('l') => self.legend = !self.legend,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('g') => self.next_gpu(),
            KeyCode::Char('j') | KeyCode::Down => self.select(row.map_or(0, |row| row + 1)),
            KeyCode::Char('k') | KeyCode::Up => self.select(row.map_or(0, |row| row.saturating_sub(1))),
            KeyCode::Home => self.select(0),
            KeyCode::End => self.select(usize::MAX),
            KeyCode::Char('s') => {
                self.order = match self.order {
                    Order::Place => Order::Memory,
                    Order::Memory => Order::Sm,
                    Order::Sm => Order::Place,
                }
            }
            _ => {}
        }
        None
    }

    // ---- drawing ----

    fn draw(&self, screen: &mut ratatui::Frame<'_>) {
        let head = self.head(screen.area().width.into());
        let [top, body, foot] =
            Layout::vertical([Constraint::Length(head.len() as u16), Constraint::Min(0), Constraint::Length(1)])
                .areas(screen.area());
        screen.render_widget(Paragraph::new(head), top);
        screen.render_widget(self.foot(), foot);
        match &self.frame {
            None => {
                let waiting = self.trouble.as_deref().unwrap_or("waiting for the driver …");
                screen.render_widget(Paragraph::new(waiting.to_owned()).wrap(Default::default()), body);
            }
            Some(frame) => self.draw_frame(screen, frame, body),
        }
        if self.help {
            draw_help(screen, &self.canvas);
        }
    }

    /// What is watched; below it why it is not new, if it is not.
    fn head(&self, width: usize) -> Vec<Line<'static>> {
        let canvas = Canvas { width, ..self.canvas };
        let mut spans = vec![bar::Span::new("migctl top", Look::Strong)];
        if let Some(Frame { map, slices, .. }) = &self.frame {
            let text = format!("  GPUs {}  slices {}  driver {}", map.gpus.len(), slices.len(), map.driver_version);
            spans.push(bar::Span::new(text, Look::Note));
        }
        spans.push(match self.paused {
            true => bar::Span::new("  paused", Look::Warning),
            false => bar::Span::new(format!("  every {}", humantime::format_duration(self.interval)), Look::Note),
        });
        let age = self.since.elapsed();
        let trouble = match &self.trouble {
            _ if self.paused || self.frame.is_none() => None,
            Some(trouble) => Some(format!("{trouble}; this is from {}s ago", age.as_secs())),
            None if age > SILENCE.max(self.interval * 3) => {
                Some(format!("the driver has not answered for {}s", age.as_secs()))
            }
            None => None,
        };
        let mut lines = vec![canvas.cut(spans)];
        lines.extend(trouble.map(|trouble| canvas.wrap(Look::Warning, "", &trouble)).unwrap_or_default());
        lines.into_iter().map(|spans| line(spans, &canvas)).collect()
    }

    fn foot(&self) -> Line<'static> {
        let order = match self.order {
            Order::Place => "place",
            Order::Memory => "memory",
            Order::Sm => "SM",
        };
        let arrows = if self.canvas.ascii { "up down" } else { "↑↓" };
        let text = format!("q quit  {arrows} slice  g GPU  s sort: {order}  p pause  l marks  ? help");
        line(vec![bar::Span::new(text, Look::Note)], &self.canvas)
    }

    fn draw_frame(&self, screen: &mut ratatui::Frame<'_>, frame: &Frame, area: Rect) {
        let canvas = Canvas { width: usize::from(area.width).min(map::WIDEST), ..self.canvas };
        let legend = if self.legend { map::legend(&frame.map.gpus, &canvas) } else { vec![] };
        let pictures: Vec<Vec<Line<'_>>> = frame.map.gpus.iter().map(|gpu| self.picture(frame, gpu, &canvas)).collect();
        let below = if area.height >= 18 { TABLE + PROCESSES } else { TABLE } + legend.len() as u16;
        let rows = frame.slices.len() as u16 + 1;
        let most = area.height.saturating_sub(below.max(rows.min(area.height / 3) + below - TABLE));
        let seen = self.in_sight(frame, &pictures, most.into());
        let [top, marks, middle, bottom] = Layout::vertical([
            Constraint::Length(seen.len() as u16),
            Constraint::Length(legend.len() as u16),
            Constraint::Max(rows.max(TABLE)),
            Constraint::Min(0),
        ])
        .areas(area);
        screen.render_widget(Paragraph::new(Text::from(seen)), top);
        let legend: Vec<Line<'_>> = legend.into_iter().map(|spans| line(spans, &canvas)).collect();
        screen.render_widget(Paragraph::new(legend), marks);
        self.draw_slices(screen, middle);
        self.draw_processes(screen, bottom);
    }

    fn picture(&self, frame: &Frame, gpu: &GpuMap, canvas: &Canvas) -> Vec<Line<'static>> {
        let block = |window: &map::Window| {
            let selected = self
                .selected
                .as_ref()
                .is_some_and(|(uuid, gi, _, start)| (uuid, Some(*gi), *start) == (&gpu.uuid, window.gi, window.start));
            bar::Block { selected, ..block(frame, gpu, window, canvas) }
        };
        map::picture(gpu, canvas, block).into_iter().map(|spans| line(spans, canvas)).collect()
    }

    /// As many of the pictures as there is room for, among them that of the chosen GPU.
    fn in_sight(&self, frame: &Frame, pictures: &[Vec<Line<'static>>], most: usize) -> Vec<Line<'static>> {
        let chosen = frame.map.gpus.iter().position(|gpu| Some(&gpu.uuid) == self.gpu.as_ref()).unwrap_or(0);
        let height = |range: std::ops::RangeInclusive<usize>| {
            pictures.get(range).into_iter().flatten().map(|picture| picture.len() + 1).sum::<usize>()
        };
        let first = (0..chosen).find(|first| height(*first..=chosen) <= most).unwrap_or(chosen);
        let mut seen: Vec<Line<'static>> = Vec::new();
        for picture in pictures.iter().skip(first) {
            if !seen.is_empty() && seen.len() + picture.len() + 1 > most {
                break;
            }
            seen.extend(picture.iter().cloned());
            seen.push(Line::default());
        }
        seen.truncate(most);
        seen
    }

    fn draw_slices(&self, screen: &mut ratatui::Frame<'_>, area: Rect) {
        let rows: Vec<Vec<String>> = self.rows().into_iter().map(columns).collect();
        let mut state = TableState::default().with_selected(self.position());
        let table = self.table(&TITLES, &rows, 4);
        let mark = if self.canvas.ascii { "> " } else { "▶ " };
        let chosen = Style::new().add_modifier(Modifier::REVERSED);
        let table = table.highlight_symbol(mark).row_highlight_style(chosen);
        screen.render_stateful_widget(table, area, &mut state);
    }

    fn draw_processes(&self, screen: &mut ratatui::Frame<'_>, area: Rect) {
        let Some(live) = self.position().and_then(|row| self.rows().get(row).copied()) else {
            let none = "no slice to select";
            screen.render_widget(line(vec![bar::Span::new(none, Look::Note)], &self.canvas), area);
            return;
        };
        let ci = live.ci.map_or_else(String::new, |ci| format!(" CI {ci}"));
        let what = format!("{} on GPU {}, GI {}{ci}: {}", live.profile, live.gpu_index, live.gi, live.holder);
        let title = bar::Span::new(self.canvas.clean(&what), Look::Strong);
        let gap = u16::from(area.height > PROCESSES);
        let [_, head, below] =
            Layout::vertical([Constraint::Length(gap), Constraint::Length(1), Constraint::Min(0)]).areas(area);
        screen.render_widget(line(vec![title], &self.canvas), head);
        let rows: Vec<Vec<String>> = live.processes.iter().map(|process| process_columns(process).to_vec()).collect();
        if rows.is_empty() {
            let none = bar::Span::new("no process that the driver lists", Look::Note);
            return screen.render_widget(line(vec![none], &self.canvas), below);
        }
        screen.render_widget(self.table(&["PID", "USER", "MEMORY", "PROCESS"], &rows, 3), below);
    }

    /// Columns as wide as their widest cell; the one numbered `wide` takes what is left.
    fn table(&self, titles: &[&str], rows: &[Vec<String>], wide: usize) -> Table<'static> {
        let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
        let width = |n: usize| {
            let cells = rows.iter().chain([&titles]).filter_map(|row| row.get(n));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0) as u16
        };
        let constraint = |n: usize| if n == wide { Constraint::Fill(1) } else { Constraint::Length(width(n)) };
        let widths: Vec<Constraint> = (0..titles.len()).map(constraint).collect();
        let cells =
            |row: &Vec<String>| Row::new(row.iter().map(|cell| Cell::new(self.canvas.clean(cell))).collect::<Vec<_>>());
        let header = cells(&titles).style(style(Look::Strong, &self.canvas));
        Table::new(rows.iter().map(cells).collect::<Vec<_>>(), widths).header(header).column_spacing(2)
    }
}

fn draw_help(screen: &mut ratatui::Frame<'_>, canvas: &Canvas) {
    let lines: Vec<Line<'_>> = HELP.iter().map(|(keys, what)| Line::raw(format!(" {keys:<15} {what}"))).collect();
    let (width, height) = (58.min(screen.area().width), (lines.len() as u16 + 2).min(screen.area().height));
    let area = screen.area().centered(Constraint::Length(width), Constraint::Length(height));
    let mut block = Block::bordered().title(" keys ").title_alignment(Alignment::Center);
    if canvas.ascii {
        block = block.border_set(ASCII_BORDER);
    }
    screen.render_widget(Clear, area);
    screen.render_widget(Paragraph::new(lines).block(block), area);
}

const ASCII_BORDER: ratatui::symbols::border::Set<'static> = ratatui::symbols::border::Set {
    top_left: "+",
    top_right: "+",
    bottom_left: "+",
    bottom_right: "+",
    vertical_left: "|",
    vertical_right: "|",
    horizontal_top: "-",
    horizontal_bottom: "-",
};

fn line(spans: Vec<bar::Span>, canvas: &Canvas) -> Line<'static> {
    Line::from(spans.into_iter().map(|span| Span::styled(span.text, style(span.look, canvas))).collect::<Vec<_>>())
}

fn style(look: Look, canvas: &Canvas) -> Style {
    let style = look.style();
    let bold = style.get_effects().contains(anstyle::Effects::BOLD);
    let plain = Style::new().add_modifier(if bold { Modifier::BOLD } else { Modifier::empty() });
    let color = |color: Option<anstyle::Color>| match color {
        Some(anstyle::Color::Ansi256(color)) if canvas.color => Color::Indexed(color.index()),
        _ => Color::Reset,
    };
    plain.fg(color(style.get_fg_color())).bg(color(style.get_bg_color()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::map::{Map, State, Window};
    use crate::gpu::MigMode;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn live(gpu: u32, gi: u32, used: u64, sm: Option<f64>) -> Live {
        Live {
            gpu: format!("GPU-{gpu}"),
            gpu_index: gpu,
            gi,
            ci: Some(0),
            uuid: None,
            profile: "1g.10gb".into(),
            holder: format!("job-{gpu}-{gi}"),
            state: State::Held,
            start: gi,
            memory_used_mib: Some(used),
            memory_total_mib: Some(9728),
            sm_percent: sm,
            dram_percent: None,
            ecc_errors: None,
            processes: vec![],
        }
    }

    fn frame(slices: Vec<Live>) -> Frame {
        let gpu = |index: u32| GpuMap {
            index,
            uuid: format!("GPU-{index}"),
            name: "A100".into(),
            mig: MigMode::On,
            managed: true,
            cordon: None,
            memory_slices: 8,
            windows: vec![Window { start: 0, size: 8, ..Window::default() }],
            displaced: vec![],
            unplaced: vec![],
            fits: vec![],
        };
        let map = Map { driver_version: "580".into(), privileged: true, gpus: (0..3).map(gpu).collect() };
        Frame { time_ms: 0, map, slices }
    }

    fn view(slices: Vec<Live>) -> View {
        let mut view = View::new(Canvas { width: 80, ascii: false, color: true }, Duration::from_secs(1));
        view.take(Ok(frame(slices)));
        view
    }

    fn press(view: &mut View, keys: &str) {
        for key in keys.chars() {
            assert!(view.key(KeyEvent::from(KeyCode::Char(key))).is_none(), "{key}");
        }
    }

    fn selected(view: &View) -> Option<&str> {
        view.position().map(|row| view.rows()[row].holder.as_str())
    }

    #[test]
    fn the_selection_follows_its_slice_and_stays_near_when_that_goes() {
        let all = || vec![live(0, 1, 5, None), live(0, 2, 9, Some(3.0)), live(2, 1, 7, Some(80.0))];
        let mut view = view(all());
        assert_eq!(selected(&view), Some("job-0-1"));
        press(&mut view, "jjj");
        assert_eq!(selected(&view), Some("job-2-1"), "the last one is the end");
        press(&mut view, "k");
        view.take(Ok(frame(all().split_off(1))));
        assert_eq!(selected(&view), Some("job-0-2"), "the same, a row higher");
        view.take(Ok(frame(vec![live(0, 1, 5, None), live(2, 1, 7, None)])));
        assert_eq!(selected(&view), Some("job-0-1"), "what is in its row now");
        press(&mut view, "s");
        assert_eq!(view.rows()[0].holder, "job-2-1");
        view.take(Ok(frame(vec![])));
        assert_eq!(selected(&view), None);
        press(&mut view, "jkgsss");
        assert_eq!(selected(&view), None);
    }

    #[test]
    fn every_gpu_comes_into_sight_also_one_without_slices() {
        let mut view = view(vec![live(0, 1, 5, None), live(2, 1, 7, None)]);
        press(&mut view, "g");
        assert_eq!((view.gpu.as_deref(), selected(&view)), (Some("GPU-1"), None));
        press(&mut view, "g");
        assert_eq!((view.gpu.as_deref(), selected(&view)), (Some("GPU-2"), Some("job-2-1")));
        let mut terminal = Terminal::new(TestBackend::new(80, 20)).unwrap();
        terminal.draw(|screen| view.draw(screen)).unwrap();
        let shown = terminal.backend().to_string();
        assert!(shown.contains("GPU 2  A100") && !shown.contains("GPU 0  A100"), "{shown}");
        press(&mut view, "g");
        assert_eq!(view.gpu.as_deref(), Some("GPU-0"));
    }

    #[test]
    fn trouble_is_told_and_the_last_look_stays() {
        let mut view = view(vec![live(0, 1, 5, None)]);
        view.take(Err("the GPU is lost".into()));
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|screen| view.draw(screen)).unwrap();
        let shown = terminal.backend().to_string();
        assert!(shown.contains("the GPU is lost; this is from 0s ago") && shown.contains("job-0-1"), "{shown}");
        press(&mut view, "p");
        view.take(Ok(frame(vec![])));
        assert_eq!(selected(&view), Some("job-0-1"), "paused");
    }

    #[test]
    fn no_terminal_is_too_small() {
        let mut view = view(vec![live(0, 1, 5, None), live(2, 1, 7, None)]);
        for keys in ["", "?", "?l"] {
            press(&mut view, keys);
            for (width, height) in [(1, 1), (2, 3), (10, 5), (20, 60), (80, 1), (80, 10), (80, 17), (300, 100)] {
                let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
                terminal.draw(|screen| view.draw(screen)).unwrap();
            }
        }
        let empty = View::new(view.canvas, Duration::from_secs(1));
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|screen| empty.draw(screen)).unwrap();
        assert!(terminal.backend().to_string().contains("waiting for the driver"));
    }
}
