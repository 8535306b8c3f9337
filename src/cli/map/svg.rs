//! The picture as SVG: everything in one file, for light and dark pages, with text as text.

use std::fmt::Write as _;

use crate::lease::short;

use super::bar::{Canvas, Look};
use super::{GpuMap, Map, State, Window, bar, fitting, no_bar, note, remarks};

/// Units of the picture's width; they are CSS pixels where nothing scales it.
const WIDTH: f64 = 960.0;
const MARGIN: f64 = 24.0;
/// Of a box.
const HEIGHT: f64 = 92.0;
/// Between boxes.
const GAP: f64 = 4.0;
/// Mean width of a character of the body text, and a little more: what does not fit by it is cut short.
const LETTER: f64 = 7.8;
const LINE: f64 = 18.0;

/// Colours by class name, for light and for dark pages: what is filled has its own text colour, so that it is the same on
/// both. After Okabe and Ito, as in the terminal.
const STYLE: &str = "
    text { font: 13px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: #1f2328; }
    .name { font-size: 16px; font-weight: 600; }
    .profile { font-weight: 600; font-size: 14px; }
    .small { font-size: 11px; }
    .note { fill: #59636e; }
    .warning { fill: #9a5b00; font-weight: 600; }
    .page { fill: #ffffff; }
    .room { fill: none; stroke: #8c959f; stroke-dasharray: 4 3; }
    .tick { stroke: #8c959f; }
    .hatch { stroke: #b6bdc5; stroke-width: 2; }
    .held { fill: #0b5fa5; } .static { fill: #00795c; } .idle { fill: #4f7d8c; } .reserved { fill: #8a5a8c; } .foreign { fill: #e0ac3c; }
    .releasing { fill: #8cc4ea; } .quarantined { fill: #c75000; } .lost { fill: none; stroke: #c75000; stroke-dasharray: 4 3; }
    .on text { fill: #ffffff; } .on .mark { fill: #ffffff; stroke: #ffffff; }
    .dark text { fill: #16191d; } .dark .mark { fill: #16191d; stroke: #16191d; }
    .mark { fill: #1f2328; stroke: #1f2328; stroke-width: 1.6; }
    .ring { fill: none !important; }
    .part { stroke: currentColor; stroke-opacity: .55; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; } .note { fill: #9198a1; } .warning { fill: #f0b849; } .page { fill: #0d1117; }
      .room { stroke: #6e7681; } .tick { stroke: #6e7681; } .hatch { stroke: #3d444d; } .mark { fill: #e6edf3; stroke: #e6edf3; }
    }";

/// The whole picture.
pub(super) fn picture(map: &Map) -> String {
    let mut body = String::new();
    let mut y = MARGIN;
    for gpu in &map.gpus {
        y = draw_gpu(&mut body, gpu, y);
    }
    y = draw_legend(&mut body, map, y);
    let height = y + MARGIN - LINE / 2.0;
    let title = match map.gpus.len() {
        1 => "MIG slices of one GPU".to_owned(),
        n => format!("MIG slices of {n} GPUs"),
    };
    let lines: Vec<String> = map.gpus.iter().map(description).collect();
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-labelledby=\"title desc\">\n  <title id=\"title\">{}</title>\n  <desc id=\"desc\">{}</desc>\n  \
         <style>{STYLE}\n  </style>\n  <defs>\n    <pattern id=\"hatch\" width=\"8\" height=\"8\" patternUnits=\"userSpaceOnUse\" \
         patternTransform=\"rotate(45)\"><path class=\"hatch\" d=\"M4 0V8\"/></pattern>\n  </defs>\n  \
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"10\"/>\n{body}</svg>\n",
        escaped(&title),
        escaped(&lines.join(" ")),
    )
}

/// A GPU in a sentence, for those who can't see the picture.
fn description(gpu: &GpuMap) -> String {
    let mut text = format!("GPU {}, {}", gpu.index, gpu.name);
    for remark in remarks(gpu) {
        text += &format!(", {remark}");
    }
    text += ": ";
    match no_bar(gpu) {
        Some(why) => text += &why,
        None => {
            let windows: Vec<String> = gpu.windows.iter().map(sentence).collect();
            text += &format!("{}; {}", windows.join("; "), fitting(gpu));
        }
    }
    text + "."
}

/// A window in words.
fn sentence(window: &Window) -> String {
    let Window { start, size, state, .. } = window;
    match &window.profile {
        Some(profile) => {
            let gi = window.gi.map_or_else(String::new, |gi| format!(", GPU instance {gi}"));
            let of = [window.held.container.as_deref().map(short), window.held.image.as_deref()].into_iter().flatten();
            let of: String = of.map(|part| format!(", {part}")).collect();
            format!("{profile} at {start}:{size}{gi}, {}, {}{of}", state.word(), window.who())
        }
        None => format!("{start}:{size} is {}", state.word()),
    }
}

fn draw_gpu(out: &mut String, gpu: &GpuMap, top: f64) -> f64 {
    let mut y = top + LINE;
    let _ = write!(out, "  <text class=\"name\" x=\"{MARGIN}\" y=\"{y}\">GPU {}", gpu.index);
    let said = 10.5 * (8 + gpu.name.chars().count()) as f64;
    let _ = write!(out, "<tspan font-weight=\"400\" dx=\"12\">{}</tspan>", escaped(&gpu.name));
    for remark in remarks(gpu) {
        let remark = fit(&remark, WIDTH - 2.0 * MARGIN - said);
        let _ = write!(out, "<tspan class=\"warning\" font-size=\"13\" dx=\"14\">{}</tspan>", escaped(&remark));
    }
    *out += "</text>\n";
    y += LINE / 2.0;
    if let Some(why) = no_bar(gpu) {
        return draw_note(out, &why, y) + LINE;
    }
    let scale = (WIDTH - 2.0 * MARGIN + GAP) / f64::from(gpu.memory_slices.max(1));
    for window in &gpu.windows {
        let x = MARGIN + scale * f64::from(window.start);
        draw_window(out, window, x, y, scale * f64::from(window.size) - GAP);
    }
    for slice in 0..gpu.memory_slices {
        let x = MARGIN + scale * f64::from(slice);
        let _ =
            writeln!(out, "  <text class=\"small note\" x=\"{x:.1}\" y=\"{:.1}\">{slice}</text>", y + HEIGHT + 13.0);
    }
    y += HEIGHT + 16.0;
    for note in gpu.windows.iter().chain(&gpu.displaced).filter_map(note) {
        y = draw_note(out, &note, y);
    }
    draw_note(out, &fitting(gpu), y) + LINE
}

fn draw_note(out: &mut String, text: &str, mut y: f64) -> f64 {
    let canvas = Canvas { width: letters(WIDTH - 2.0 * MARGIN), ascii: false, color: false };
    for line in canvas.wrap(Look::Note, "", text) {
        let text: String = line.into_iter().map(|span| span.text).collect();
        y += LINE;
        let _ = writeln!(out, "  <text class=\"note\" x=\"{MARGIN}\" y=\"{y:.1}\">{}</text>", escaped(&text));
    }
    y
}

fn class(state: State) -> (String, &'static str) {
    let ink = match state {
        State::Held | State::Static | State::Idle | State::Reserved | State::Quarantined => "on",
        State::Foreign | State::Releasing => "dark",
        State::Lost | State::Hidden | State::Free | State::Unusable => "",
    };
    let fill = if matches!(state, State::Free | State::Unusable) { "room".into() } else { crate::cli::word(state) };
    (fill, ink)
}

fn draw_window(out: &mut String, window: &Window, x: f64, y: f64, width: f64) {
    let (fill, ink) = class(window.state);
    let _ = writeln!(out, "  <g class=\"{ink}\"><title>{}</title>", escaped(&sentence(window)));
    let _ = writeln!(
        out,
        "    <rect class=\"{fill}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{HEIGHT}\" rx=\"7\"/>"
    );
    if window.state == State::Unusable {
        let _ = writeln!(
            out,
            "    <rect fill=\"url(#hatch)\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{HEIGHT}\" rx=\"7\"/>"
        );
    }
    let (left, inner) = (x + 10.0, width - 20.0);
    let mut text = |class: &str, left: f64, below: f64, text: &str| {
        if text.is_empty() {
            return;
        }
        let text = escaped(text);
        let _ = writeln!(out, "    <text class=\"{class}\" x=\"{left:.1}\" y=\"{:.1}\">{text}</text>", y + below);
    };
    match &window.profile {
        Some(profile) => {
            text("profile", left + 16.0, 24.0, &fit(profile, inner - 16.0));
            let who = window.who();
            let (first, rest) = bar::split_name(&who, letters(inner));
            text("", left, 45.0, &fit(first, inner));
            text("", left, 61.0, &fit(rest, inner));
            let gi = window.gi.map(|gi| fit(&format!("GI {gi}"), inner));
            match (gi, window.parts()) {
                (Some(gi), None) => text("small", left, 80.0, &gi),
                (Some(gi), Some(_)) if rest.is_empty() => text("small", left, 61.0, &gi),
                _ => {}
            }
            *out += &mark(window.state, left + 5.0, y + 19.0);
        }
        None if window.state == State::Free => text("note", left, 24.0, "free"),
        None => {}
    }
    draw_parts(out, window, x, y, width);
    *out += "  </g>\n";
}

/// Compute instances that share a GPU instance, side by side in the lower part of its box.
fn draw_parts(out: &mut String, window: &Window, x: f64, y: f64, width: f64) {
    let parts = window.parts().unwrap_or_default();
    let all: u32 = parts.iter().map(|(share, _)| share).sum();
    let mut before = 0;
    for (share, part) in parts {
        let left = x + width * f64::from(before) / f64::from(all.max(1));
        let room = width * f64::from(share) / f64::from(all.max(1));
        let text = escaped(&fit(&part, room - 14.0));
        let _ = writeln!(out, "    <text class=\"small\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>", left + 10.0, y + 80.0);
        if before > 0 {
            let (top, bottom) = (y + 67.0, y + HEIGHT - 6.0);
            let _ = writeln!(out, "    <path class=\"part mark\" d=\"M{left:.1} {top:.1}V{bottom:.1}\"/>");
        }
        before += share;
    }
}

/// The mark of a state, around a point: the same forms as in the terminal.
fn mark(state: State, x: f64, y: f64) -> String {
    let form = match state {
        State::Held => format!("<circle class=\"mark\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>"),
        State::Static => format!("<circle class=\"mark ring\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\"/>"),
        State::Idle => {
            format!("<circle class=\"mark ring\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\" stroke-dasharray=\"2 2.4\"/>")
        }
        State::Reserved => format!("<path class=\"mark\" d=\"M{x:.1} {:.1}l4 5l-4 5l-4 -5z\"/>", y - 5.0),
        State::Foreign => format!("<path class=\"mark\" d=\"M{x:.1} {:.1}l4.6 8h-9.2z\"/>", y - 4.5),
        State::Releasing => format!(
            "<circle class=\"mark ring\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\"/><path class=\"mark\" d=\"M{x:.1} {:.1}a4.2 4.2 0 0 0 0 8.4z\"/>",
            y - 4.2
        ),
        State::Quarantined => {
            format!("<path class=\"mark ring\" d=\"M{:.1} {:.1}l8 8m0 -8l-8 8\"/>", x - 4.0, y - 4.0)
        }
        State::Lost => format!("<text class=\"profile\" x=\"{:.1}\" y=\"{:.1}\">?</text>", x - 4.0, y + 5.0),
        State::Hidden | State::Free | State::Unusable => return String::new(),
    };
    format!("    {form}\n")
}

fn draw_legend(out: &mut String, map: &Map, top: f64) -> f64 {
    let windows = map.gpus.iter().flat_map(|gpu| gpu.windows.iter().chain(&gpu.displaced));
    let states: std::collections::BTreeSet<State> = windows.map(|window| window.state).collect();
    let (mut x, mut y) = (MARGIN, top);
    for state in states.into_iter().filter(|state| *state != State::Free) {
        let width = 30.0 + LETTER * state.word().chars().count() as f64;
        if x + width > WIDTH - MARGIN {
            (x, y) = (MARGIN, y + LINE + 6.0);
        }
        let (fill, ink) = class(state);
        let swatch = if state == State::Unusable { "fill=\"url(#hatch)\"".into() } else { format!("class=\"{fill}\"") };
        let _ = writeln!(
            out,
            "  <g class=\"{ink}\"><rect {swatch} x=\"{x:.1}\" y=\"{y:.1}\" width=\"20\" height=\"18\" rx=\"4\"/>\n{}  </g>",
            mark(state, x + 10.0, y + 9.0)
        );
        let _ =
            writeln!(out, "  <text class=\"note\" x=\"{:.1}\" y=\"{:.1}\">{}</text>", x + 26.0, y + 13.5, state.word());
        x += width + 14.0;
    }
    y + LINE
}

/// As much of a text as there is room for.
fn fit(text: &str, room: f64) -> String {
    let most = letters(room);
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// Letters that fit into a room, at least one.
fn letters(room: f64) -> usize {
    (room / LETTER).max(1.0) as usize
}

/// A text as XML can have it.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::holder::Holder;
    use crate::gpu::MigMode;
    use proptest::prelude::*;

    fn map(name: &str, state: State) -> Map {
        let window = Window {
            start: 0,
            size: 4,
            state,
            profile: Some("3g.40gb".into()),
            held: Holder { name: Some(name.into()), ..Holder::default() },
            gi: Some(1),
            reason: Some(name.into()),
            ..Window::default()
        };
        let room = Window { start: 4, size: 4, ..Window::default() };
        let cordon = Some(crate::cli::map::Closed { reason: Some(name.into()), since_ms: 0 });
        let gpu = GpuMap {
            index: 0,
            uuid: "GPU-0".into(),
            name: name.into(),
            mig: MigMode::On,
            managed: true,
            cordon,
            memory_slices: 8,
            windows: vec![window, room],
            displaced: vec![],
            unplaced: vec![],
            fits: vec![],
        };
        Map { driver_version: "580".into(), privileged: true, gpus: vec![gpu] }
    }

    #[test]
    fn what_does_not_fit_is_cut_and_what_xml_has_not_is_replaced() {
        assert_eq!(
            (fit("trainer", 100.0), fit("trainer", 30.0), fit("trainer", -5.0)),
            ("trainer".into(), "tr…".into(), "…".into())
        );
        assert_eq!(escaped("<a b=\"c\">&\u{1}\u{ffff}"), "&lt;a b=&quot;c&quot;&gt;&amp;\u{fffd}\u{fffd}");
    }

    proptest! {
        #[test]
        fn whatever_the_names_are_it_is_xml(name in any::<String>(), state in 0..10_usize) {
            let states = [State::Held, State::Static, State::Reserved, State::Foreign, State::Releasing, State::Quarantined,
                State::Lost, State::Free, State::Unusable, State::Idle];
            let text = picture(&map(&name, states[state]));
            let document = roxmltree::Document::parse(&text).unwrap();
            prop_assert_eq!(document.root_element().tag_name().name(), "svg");
        }
    }
}
