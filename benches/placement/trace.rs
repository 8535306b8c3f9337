//! Streams of requests: JSON lines, plain or gzipped. The first has the node (`{"meta": {"node": ["A100-80", …], "warm": 0.1}}`), each
//! other a request, in order of arrival: `{"id": 0, "t_ms": 5, "life_ms": 7, "profiles": ["1g.10gb"]}`.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::MultiGzDecoder;
use mig_hook::gpu::Device;
use mig_hook::request::Want;
use serde::Deserialize;

use super::boards;

/// Names of GPUs in traces, and their keys in sim/boards.json; these keys are understood, too.
const MODELS: [(&str, &str); 6] = [
    ("A100-40", "a100-sxm4-40gb"),
    ("A100-80", "a100-sxm4-80gb"),
    ("A30", "a30-24gb"),
    ("B200", "b200-180gb"),
    ("H100-80", "h100-sxm-80gb"),
    ("H200", "h200-141gb"),
];
/// No machine has more GPUs.
const MOST_GPUS: usize = 64;

/// What is asked of a node.
#[derive(Debug)]
pub struct Trace {
    /// Its empty GPUs.
    pub devices: Vec<Device>,
    /// In order of arrival.
    pub requests: Vec<Request>,
    /// So many of the first requests only fill the node, and are not counted.
    pub warm: usize,
}

/// A request, given all that it wants at once or refused.
#[derive(Debug)]
pub struct Request {
    pub id: u64,
    /// Its arrival, in ms.
    pub at: u64,
    /// When it ends, if it is given what it wants.
    pub end: u64,
    pub wants: Vec<Want>,
}

#[derive(Deserialize)]
struct Head {
    meta: Meta,
}

#[derive(Deserialize)]
struct Meta {
    node: Vec<String>,
    warm: f64,
}

#[derive(Deserialize)]
struct Line {
    id: u64,
    t_ms: u64,
    life_ms: u64,
    profiles: Vec<String>,
}

/// Reads a file.
pub fn read(path: &Path) -> Result<Trace> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    unpacked(&bytes).with_context(|| format!("{} is no trace", path.display()))
}

/// The trace of a file's bytes.
pub fn unpacked(bytes: &[u8]) -> Result<Trace> {
    let mut text = String::new();
    match bytes.starts_with(&[0x1f, 0x8b]) {
        true => MultiGzDecoder::new(bytes).read_to_string(&mut text).context("it cannot be unpacked")?,
        false => (&*bytes).read_to_string(&mut text).context("it is no text")?,
    };
    parse(&text)
}

fn parse(text: &str) -> Result<Trace> {
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let (at, first) = lines.next().context("it is empty")?;
    let Head { meta } = serde_json::from_str(first)
        .with_context(|| format!("line {}: expected {{\"meta\": {{\"node\": […], \"warm\": 0.1}}}}", at + 1))?;
    let devices = node(&meta.node)?;
    let mut requests: Vec<Request> = Vec::new();
    for (at, line) in lines {
        let read = || {
            let line: Line = serde_json::from_str(line)?;
            let earlier = requests.last().map_or(0, |request| request.at);
            ensure!(line.t_ms >= earlier, "t_ms {} comes after {earlier}: requests are in order of arrival", line.t_ms);
            request(&devices, line)
        };
        requests.push(read().with_context(|| format!("line {}", at + 1))?);
    }
    ensure!((0.0..1.0).contains(&meta.warm), "meta.warm is {}, and should be a share from 0 to below 1", meta.warm);
    ensure!(!requests.is_empty(), "it has no requests");
    let warm = (meta.warm * requests.len() as f64) as usize;
    Ok(Trace { devices, requests, warm })
}

/// The GPUs of those names, empty.
pub fn node(names: &[String]) -> Result<Vec<Device>> {
    ensure!(!names.is_empty(), "meta.node names no GPU");
    ensure!(names.len() <= MOST_GPUS, "meta.node names {} GPUs; at most {MOST_GPUS} are replayed", names.len());
    let device = |(index, name): (u32, &String)| {
        let key = MODELS.iter().find(|(model, _)| model == name).map_or(name.as_str(), |(_, key)| key);
        let Some(mut devices) = boards::devices(key, index..index + 1) else {
            let known = MODELS.map(|(model, _)| model).join(", ");
            bail!("meta.node names {name}; known are {known}, and the keys of sim/boards.json");
        };
        Ok(devices.remove(0))
    };
    (0..).zip(names).map(device).collect()
}

fn request(devices: &[Device], line: Line) -> Result<Request> {
    ensure!(!line.profiles.is_empty(), "the request names no profile");
    let offered = |name: &str| devices.iter().flat_map(|device| &device.profiles).any(|profile| profile.name == name);
    if let Some(name) = line.profiles.iter().find(|name| !offered(name)) {
        bail!("no GPU of the node offers {name}");
    }
    let end = line.t_ms.checked_add(line.life_ms).context("t_ms + life_ms is out of range")?;
    let wants = line.profiles.into_iter().map(Want::Profile).collect();
    Ok(Request { id: line.id, at: line.t_ms, end, wants })
}
