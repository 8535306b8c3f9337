//! The settings.

use mig_hook::config::{POLICIES, Settings};
use mig_hook::first::{self, Outline};

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let settings = match Settings::parse(text) {
        Ok(settings) => settings,
        Err(error) => {
            assert!(!error.is_empty() && error.len() < 2000 + 4 * text.len(), "{error}");
            return;
        }
    };
    let paths = [&settings.state_dir, &settings.driver_root, &settings.nvml, &settings.proc_root, &settings.dev_root];
    let optional = [&settings.runtime, &settings.audit_file, &settings.cdi_spec, &settings.driver_cdi_spec];
    for path in paths.into_iter().chain(optional.into_iter().flatten()).chain([&settings.log_socket]) {
        assert!(path.is_absolute(), "{path:?}");
    }
    assert!(POLICIES.contains(&settings.policy.as_str()) && settings.slices_per_container > 0);
    assert!(settings.cdi_spec.is_none_or(|spec| spec.extension().is_some_and(|e| e == "json")));

    // The first stage reads the same file with a reader that knows less: leases must be looked for where they are kept.
    let outline: Outline = toml::from_str(text).expect("what is valid as a whole is valid in part");
    assert_eq!(first::state_dir(outline.state_dir), settings.state_dir);
    assert_eq!(outline.runtime.path, settings.runtime);

    assert!(Settings::parse(&format!("unknown-key = 1\n{text}")).is_err(), "an unknown key is refused");
}
