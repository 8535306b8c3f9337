//! Boards that are not in our tables: read from a description, and held against what any board is like.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::board::{Board, CiProfile, GiProfile, Span};
use crate::calls::{CI_PROFILE_COUNT, GI_PROFILE_COUNT};
use crate::layout::GI_IDS;

/// Architectures whose rules are known.
const ARCHITECTURES: [&str; 3] = ["Ampere", "Hopper", "Blackwell"];

/// Reads the board that a file describes.
pub fn read(path: &Path) -> Result<Board> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let board =
        serde_json::from_str(&text).map_err(anyhow::Error::from).and_then(|board| check(&board).map(|()| board));
    board.with_context(|| {
        format!("{} describes no board; `nvml-sim boards a30-24gb --json` prints one to begin with", path.display())
    })
}

fn check(board: &Board) -> Result<()> {
    ensure!(!board.key.is_empty() && !board.name.is_empty(), "`key` and `name` must say something");
    ensure!(
        ARCHITECTURES.contains(&board.architecture.as_str()),
        "`architecture` is `{}`, not {}",
        board.architecture,
        ARCHITECTURES.join(", ")
    );
    ensure!((1..=64).contains(&board.grid), "`grid` is {}, not 1 to 64 memory slices", board.grid);
    ensure!(board.memory_mib > 0, "`memory_mib` is 0");
    ensure!(!board.profiles.is_empty(), "`profiles` is empty: there would be nothing to cut");
    for (place, profile) in board.profiles.iter().enumerate() {
        let earlier = &board.profiles[..place];
        ensure!(earlier.iter().all(|other| other.name != profile.name), "two profiles are called {}", profile.name);
        ensure!(earlier.iter().all(|other| other.id != profile.id), "two profiles have the id {}", profile.id);
        ensure!(
            earlier.iter().all(|other| other.index != profile.index),
            "two profiles have the index {}",
            profile.index
        );
        check_profile(board, profile).with_context(|| format!("profile {}", profile.name))?;
    }
    let places: BTreeSet<_> = board.places().collect();
    ensure!(
        places.len() <= GI_IDS as usize,
        "the profiles have {} different placements, and a GPU has {GI_IDS} ids for instances",
        places.len()
    );
    Ok(())
}

fn check_profile(board: &Board, profile: &GiProfile) -> Result<()> {
    ensure!(
        profile.index < GI_PROFILE_COUNT,
        "`index` is {}, and NVML counts to {}",
        profile.index,
        GI_PROFILE_COUNT - 1
    );
    ensure!(profile.slices > 0 && profile.count > 0, "`slices` and `count` must be 1 or more");
    ensure!(
        (1..=board.memory_mib).contains(&profile.memory_mib),
        "`memory_mib` is {}, and the board has {}",
        profile.memory_mib,
        board.memory_mib
    );
    check_placements(&profile.placements, board.grid, "memory")?;
    if let Some(all) = board.engines {
        ensure!(profile.engines.fit(all), "it has more media engines than the board");
    }
    for (place, compute) in profile.compute.iter().enumerate() {
        let earlier = &profile.compute[..place];
        ensure!(earlier.iter().all(|other| other.id != compute.id), "two compute profiles have the id {}", compute.id);
        check_compute(profile, compute).with_context(|| format!("compute profile {}", compute.name))?;
    }
    ensure!(profile.whole().is_some(), "no compute profile has all of its {} slices", profile.slices);
    Ok(())
}

fn check_compute(owner: &GiProfile, compute: &CiProfile) -> Result<()> {
    ensure!(compute.id == compute.index, "`id` and `index` differ: for compute profiles NVML has one number");
    ensure!(
        compute.index < CI_PROFILE_COUNT,
        "`index` is {}, and NVML counts to {}",
        compute.index,
        CI_PROFILE_COUNT - 1
    );
    ensure!(compute.slices > 0 && compute.count > 0, "`slices` and `count` must be 1 or more");
    ensure!(compute.sm <= owner.sm, "it has {} multiprocessors, and its owner {}", compute.sm, owner.sm);
    check_placements(&compute.placements, owner.slices, "compute")
}

fn check_placements(placements: &[Span], room: u32, what: &str) -> Result<()> {
    let Some(first) = placements.first() else { bail!("`placements` is empty") };
    for span in placements {
        ensure!(span.size == first.size && span.size > 0, "the placements {first} and {span} are not of one size");
        let end = span.start.checked_add(span.size);
        ensure!(end.is_some_and(|end| end <= room), "the placement {span} reaches beyond {room} {what} slices");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::tests::boards;

    #[test]
    fn every_known_board_describes_itself() {
        for board in boards().into_iter().filter(|board| !board.profiles.is_empty()) {
            check(&board).unwrap();
            let text = serde_json::to_string(&board).unwrap();
            assert_eq!(serde_json::from_str::<Board>(&text).unwrap(), board);
        }
    }

    /// A change that no board survives, and what is said of it.
    type Fault = (fn(&mut Board), &'static str);

    #[test]
    fn what_no_board_is_like_is_said() {
        let faults: [Fault; 14] = [
            (|board| board.key.clear(), "must say something"),
            (|board| board.architecture = "Volta".into(), "`architecture` is `Volta`, not Ampere, Hopper, Blackwell"),
            (|board| board.grid = 0, "`grid` is 0"),
            (|board| board.memory_mib = 0, "`memory_mib` is 0"),
            (|board| board.profiles.clear(), "nothing to cut"),
            (|board| board.profiles[1].name = board.profiles[0].name.clone(), "two profiles are called 1g.6gb"),
            (|board| board.profiles[1].id = 14, "two profiles have the id 14"),
            (|board| board.profiles[1].index = 0, "two profiles have the index 0"),
            (|board| board.profiles[0].index = 18, "profile 1g.6gb: `index` is 18, and NVML counts to 17"),
            (|board| board.profiles[0].memory_mib = 30_000, "`memory_mib` is 30000, and the board has 24576"),
            (|board| board.profiles[0].placements.clear(), "`placements` is empty"),
            (|board| board.profiles[0].placements[1].size = 2, "the placements 0:1 and 1:2 are not of one size"),
            (|board| board.profiles[0].placements[1].start = u32::MAX, "reaches beyond 4 memory slices"),
            (|board| board.profiles[0].compute.clear(), "no compute profile has all of its 1 slices"),
        ];
        for (spoil, wanted) in faults {
            let mut board = boards().into_iter().find(|board| board.key == "a30-24gb").unwrap();
            spoil(&mut board);
            let said = format!("{:#}", check(&board).unwrap_err());
            assert!(said.contains(wanted), "{said}, not {wanted}");
        }
    }
}
