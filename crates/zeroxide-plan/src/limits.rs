//! Requests that no machine will have are refused before anything is computed of them: below these limits no sum of bytes
//! in a plan leaves 64 bits.

use crate::error::{PlanError, Result};
use crate::mesh::Mesh;
use crate::plan::PlanRequest;

/// Elements of a model: 281 million million. With less than 128 bytes an element, and all that is padded to whole pages
/// and equal slices, sums stay below 2^56.
const MOST_ELEMENTS: u64 = 1 << 48;
/// Bytes that a user may ask for at once: an exbibyte.
const MOST_BYTES: u64 = 1 << 60;
/// Ranks of a job.
const MOST_RANKS: u64 = 1 << 24;
/// Units that are sent for ahead of their use.
const MOST_AHEAD: u64 = 1 << 32;

/// Refuses what is beyond a limit, and ranks that no group has.
pub(crate) fn check(request: &PlanRequest) -> Result<()> {
    let meshes = request.units.iter().filter_map(|unit| unit.mesh);
    for mesh in std::iter::once(request.mesh).chain(meshes) {
        check_mesh(mesh)?;
    }
    let elements = request
        .units
        .iter()
        .flat_map(|unit| &unit.params)
        .fold(0_u64, |sum, param| sum.saturating_add(param.numel));
    below("elements of all parameters", elements, MOST_ELEMENTS)?;
    below(
        "zeroxide.tile_bytes",
        request.tile_bytes.unwrap_or(0),
        MOST_BYTES,
    )?;
    below(
        "zeroxide.staging_bytes",
        request.staging_bytes.unwrap_or(0),
        MOST_BYTES,
    )?;
    below("zeroxide.state_in_memory", request.pinned, MOST_BYTES)?;
    below("bytes of the process", request.resident, MOST_BYTES)?;
    below(
        "zeroxide.prefetch",
        u64::try_from(request.prefetch).unwrap_or(u64::MAX),
        MOST_AHEAD,
    )
}

fn check_mesh(mesh: Mesh) -> Result<()> {
    let world = u64::from(mesh.shards) * u64::from(mesh.replicas);
    if u64::from(mesh.rank) >= world {
        return Err(PlanError::NoSuchRank(mesh));
    }
    below("ranks", world, MOST_RANKS)
}

fn below(what: &'static str, got: u64, most: u64) -> Result<()> {
    if got > most {
        return Err(PlanError::BeyondLimit { what, got, most });
    }
    Ok(())
}
