//! Which roles live on which ranks, as data.
//!
//! A pool is a set of ranks; a role has one pool and uses all of it; roles of one pool take turns on the same ranks,
//! and pools run at the same time. Pools do not overlap. Deliberately absent: fused roles. Colocation is a line here.

use crate::error::ControlError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a role lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolePlace {
    /// Its pool.
    pub pool: String,
    /// The number of ranks that the role's degrees multiply to.
    pub ranks: usize,
}

/// Pools of ranks, and the role's places in them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Global ranks of each pool, in the order in which a role's mesh is laid over them.
    pub pools: BTreeMap<String, Vec<usize>>,
    /// The roles.
    pub roles: BTreeMap<String, RolePlace>,
}

impl Placement {
    /// All roles on all ranks, taking turns.
    pub fn colocated(roles: &[&str], world_size: usize) -> Placement {
        Placement::grouped(&[(roles, world_size)])
    }

    /// Roles by group, each group on its own next so many ranks. A group's pool is named after its roles.
    pub fn grouped(groups: &[(&[&str], usize)]) -> Placement {
        let mut placement = Placement::default();
        let mut next = 0;
        for (roles, ranks) in groups {
            let pool = roles.join("+");
            placement.pools.insert(pool.clone(), (next..next + ranks).collect());
            let place = RolePlace { pool, ranks: *ranks };
            placement.roles.extend(roles.iter().map(|role| ((*role).to_owned(), place.clone())));
            next += ranks;
        }
        placement
    }

    /// Checks that pools do not overlap and fit the world, and that roles fit their pools.
    ///
    /// # Errors
    /// The first rank, pool or role that does not fit, with sizes and what to change.
    pub fn check(&self, world_size: usize) -> Result<(), ControlError> {
        let mut owner: BTreeMap<usize, &str> = BTreeMap::new();
        for (pool, ranks) in &self.pools {
            for &rank in ranks {
                if rank >= world_size {
                    return wrong(format!(
                        "pool `{pool}` has rank {rank}, but the job has {world_size} ranks (0 to {})",
                        world_size.saturating_sub(1)
                    ));
                }
                if let Some(other) = owner.insert(rank, pool) {
                    return wrong(format!(
                        "rank {rank} is in pool `{other}` and in pool `{pool}`; pools do not overlap: put the roles \
                         that share ranks into one pool"
                    ));
                }
            }
        }
        if let Some(idle) = (0..world_size).find(|rank| !owner.contains_key(rank)) {
            return wrong(format!("rank {idle} of {world_size} is in no pool; put it into one or start fewer ranks"));
        }
        self.roles.iter().try_for_each(|(role, place)| self.check_role(role, place))
    }

    fn check_role(&self, role: &str, place: &RolePlace) -> Result<(), ControlError> {
        let Some(ranks) = self.pools.get(&place.pool) else {
            let known: Vec<&str> = self.pools.keys().map(String::as_str).collect();
            return wrong(format!(
                "role `{role}` is placed on pool `{}`, which does not exist; pools are {}",
                place.pool,
                known.join(", ")
            ));
        };
        if ranks.len() != place.ranks {
            return wrong(format!(
                "role `{role}` needs {} ranks (the product of its degrees), but its pool `{}` has {}; change the \
                 role's degrees or the pool's size",
                place.ranks,
                place.pool,
                ranks.len()
            ));
        }
        Ok(())
    }

    /// Pool and ranks of a role.
    ///
    /// # Errors
    /// A role that is not placed.
    pub fn ranks_of(&self, role: &str) -> Result<(&str, &[usize]), ControlError> {
        let known = || self.roles.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let place = self.roles.get(role);
        let place = place.ok_or_else(|| {
            ControlError::Placement(format!("this job has no role `{role}`; its roles are {}", known()))
        })?;
        Ok((&place.pool, self.pools.get(&place.pool).map_or(&[], Vec::as_slice)))
    }
}

fn wrong<T>(message: String) -> Result<T, ControlError> {
    Err(ControlError::Placement(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::{Expect, expect};

    fn check(placement: &Placement, world_size: usize, expected: Expect) {
        let found = placement.check(world_size).map_or_else(|e| e.to_string(), |()| "fits".into());
        expected.assert_eq(&found);
    }

    #[test]
    fn any_grouping_is_data() {
        check(&Placement::colocated(&["policy", "critic", "reference"], 4), 4, expect!["fits"]);
        let split = Placement::grouped(&[(&["policy", "reference"], 4), (&["critic"], 2), (&["rollout"], 2)]);
        check(&split, 8, expect!["fits"]);
        assert_eq!(split.ranks_of("critic").unwrap(), ("critic", &[4, 5][..]));
        assert_eq!(split.ranks_of("reference").unwrap(), ("policy+reference", &[0, 1, 2, 3][..]));
        expect!["this job has no role `judge`; its roles are critic, policy, reference, rollout"]
            .assert_eq(&split.ranks_of("judge").unwrap_err().to_string());
    }

    #[test]
    fn what_does_not_fit_names_role_pool_and_sizes() {
        let mut placement = Placement::grouped(&[(&["policy"], 4), (&["critic"], 2)]);
        check(&placement, 5, expect!["pool `critic` has rank 5, but the job has 5 ranks (0 to 4)"]);
        check(&placement, 7, expect!["rank 6 of 7 is in no pool; put it into one or start fewer ranks"]);
        placement.roles.insert("reward".into(), RolePlace { pool: "spare".into(), ranks: 1 });
        check(
            &placement,
            6,
            expect!["role `reward` is placed on pool `spare`, which does not exist; pools are critic, policy"],
        );
        placement.roles.insert("reward".into(), RolePlace { pool: "critic".into(), ranks: 4 });
        check(
            &placement,
            6,
            expect![
                "role `reward` needs 4 ranks (the product of its degrees), but its pool `critic` has 2; change the role's degrees or the pool's size"
            ],
        );
        placement.pools.insert("critic".into(), vec![3, 5]);
        check(
            &placement,
            6,
            expect![
                "rank 3 is in pool `critic` and in pool `policy`; pools do not overlap: put the roles that share ranks into one pool"
            ],
        );
    }
}
