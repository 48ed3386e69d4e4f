//! Where files of Tidegate's own are kept when no folder is named.

use std::{env, path::PathBuf};

use etcetera::BaseStrategy;

/// The folder when none is named: `$TIDEGATE_DATA_DIR`, else `tidegate` in the user's XDG data folder.
///
/// # Errors
/// When the variable is not set and the user has no home; the text says why.
pub fn default() -> Result<PathBuf, String> {
    if let Some(dir) = env::var_os("TIDEGATE_DATA_DIR").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir));
    }
    let xdg = etcetera::choose_base_strategy().map_err(|e| e.to_string())?;
    Ok(xdg.data_dir().join("tidegate"))
}
